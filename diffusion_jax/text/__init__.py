"""Texts become numbers: CLIP's tokenizer from the files users have, and prompts with weights, of any length."""
