"""What has been compressed and measured: the index, and the checkpoints small enough to ship."""
