"""Memory bandwidth of Apple's chips, as Apple states it in the technical specifications of the Macs that have them."""

from __future__ import annotations

CHIPS: dict[str, tuple[tuple[str, float], ...]] = {
    "m1": (("M1", 68.25),),
    "m1-pro": (("M1 Pro", 200),),
    "m1-max": (("M1 Max", 400),),
    "m1-ultra": (("M1 Ultra", 800),),
    "m2": (("M2", 100),),
    "m2-pro": (("M2 Pro", 200),),
    "m2-max": (("M2 Max", 400),),
    "m2-ultra": (("M2 Ultra", 800),),
    "m3": (("M3", 100),),
    "m3-pro": (("M3 Pro", 150),),
    "m3-max": (("M3 Max, 30-core GPU", 300), ("M3 Max, 40-core GPU", 400)),
    "m3-ultra": (("M3 Ultra", 819),),
    "m4": (("M4", 120),),
    "m4-pro": (("M4 Pro", 273),),
    "m4-max": (("M4 Max, 32-core GPU", 410), ("M4 Max, 40-core GPU", 546)),
}
"""By the name of --predict: each configuration of a chip, and GB/s. There is no M4 Ultra."""
HERE = "here"
"""This machine's processor, at the bandwidth that is measured: to see how far predictions hold."""
