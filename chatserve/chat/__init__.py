"""Floor 4: text. Knows messages, templates, tokens and replies; never pages, never HTTP."""
