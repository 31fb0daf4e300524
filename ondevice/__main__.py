"""`python -m ondevice` is `ondevice`."""

from ondevice.cli import main

main()
