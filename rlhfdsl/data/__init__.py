"""From files and hub data sets to rendered, tokenised and blended rows, with the facts that a plan needs."""
