"""Architecture plugins: one module for each decoder family."""
