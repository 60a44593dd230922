"""The data path: what one worker does with each packet, in both directions."""
