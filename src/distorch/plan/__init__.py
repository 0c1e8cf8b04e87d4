"""WHERE weights rest: blocks, placements and the plan; pure, without torch."""
