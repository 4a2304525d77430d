"""The torch reader of the architecture kinds."""
