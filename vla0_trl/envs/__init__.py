"""Simulators and scripted experts. They know nothing of models; each is imported only by those who use it."""
