"""Pure functions of tensors: no files, no transformers, no prints."""
