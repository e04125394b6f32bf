"""What a fleet needs around it: policies, a project's first files, what Terraform leaves alone."""
