"""`ondevice convert`: a model in our format, requantized or made sparse."""
