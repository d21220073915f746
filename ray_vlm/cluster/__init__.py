"""The Ray cluster: joining or starting one, and checking beforehand that it can run the job."""
