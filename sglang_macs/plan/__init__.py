"""What is planned, one layer at a time: the batch, the experts' profile, and the plan as a pure function of both."""
