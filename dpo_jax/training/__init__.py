"""From per-pair losses to parameter updates."""
