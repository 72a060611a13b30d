"""Words and ids: tokenizers, templates, prompts that keep the ids they were computed with."""
