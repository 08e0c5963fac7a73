"""Search for the blocks to remove, by any criterion. The public names are in `streamline_hooks.selection`."""
