"""The simulated region: AWS as its documentation describes it, spoken over HTTP on this machine alone.

It knows nothing of Calve: no code is shared with what it tests, only the ground floor is imported.
`server` speaks HTTP/1.1 and makes `faults` happen, `signature` verifies SigV4 and judges what a principal may do,
`objects` is S3's data plane, `imds` one machine's metadata, `resolver` the names that a virtual machine looks up.
`ebs` is EBS direct over `blocks`, `storage` what EC2 knows of the same: snapshots, images, imports.
Types: `Server`, `Request`, `Response`, `FaultPlan`, `Principals`, `ObjectService`, `Imds`, `Resolver`, `Snapshots`,
`EbsService`, `Storage`.
"""
