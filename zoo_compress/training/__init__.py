"""Training: data sources, one resumable loop on timm's parts, and measuring."""
