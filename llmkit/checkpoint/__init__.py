"""A checkpoint as a bundle: tensors, config, tokenizer and history travel together."""
