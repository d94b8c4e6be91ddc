"""`mixlora check`: what is wrong with the data, found before a training starts."""
