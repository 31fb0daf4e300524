"""The terminal chat behind `ondevice chat`."""
