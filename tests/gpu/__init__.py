"""An engine on a GPU. What a CPU can do for it runs there too: artifacts for cuda, in steps padded to buckets."""
