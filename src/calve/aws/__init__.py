"""AWS through boto3: one thin gateway per service, frozen dataclasses in and out.

What for: launch templates and instances, Auto Scaling groups and their refreshes, target groups.
Knows: which IAM actions each call needs (`actions` on every method), and how AWS's errors map to ours.
Types: `session.Session`, `ec2.Ec2`, `autoscaling.AutoScaling`, `elb.Elb`, and what these return.
boto3 is imported when the first client is made, not before.
"""
