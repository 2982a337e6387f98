"""Samples, prompts, augmentation and batches; import from the modules."""
