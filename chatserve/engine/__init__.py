"""Floor 3: steps and scheduling. Knows tokens and pages, never text and never HTTP."""
