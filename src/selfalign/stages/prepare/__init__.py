"""Prepare seed pairs and corpus documents: read them, filter them one by one, pick from all of them."""
