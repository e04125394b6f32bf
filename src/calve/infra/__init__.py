"""What a fleet needs around it in an account: policies, what Terraform must leave alone, a project's first files."""
