"""From a rule to a verified folder, to the Hub, and back to the proof."""
