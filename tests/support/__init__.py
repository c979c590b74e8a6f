"""What tests share with each other: servers and stand-ins, fixtures' programs, models.

Nothing here is a test, and nothing here imports one.
"""
