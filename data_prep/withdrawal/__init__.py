"""People who leave: their lists, their removal, its log, and the models that saw them."""
