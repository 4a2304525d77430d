"""What scores and continues token sequences in place of llmkit's own decoder, one module each; `engine` is the seam."""
