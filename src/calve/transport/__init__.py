"""One HTTP client, for the command line and for the agent in the initrd.

What for: bytes to and from S3, EBS direct, binary caches and the instance metadata service.
Knows: HTTP/1.1 on kept connections, stalls and short bodies, one retry policy, ranges, SigV4, IMDSv2, AWS's errors.
Types: http.Client, http.Response, retry.Policy, sigv4.Signer, credentials.Credentials and Provider, imds.Imds,
resume.ResumingReader. Standard library only.
"""
