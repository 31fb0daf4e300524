"""`ondevice eval`: what a model costs in quality."""
