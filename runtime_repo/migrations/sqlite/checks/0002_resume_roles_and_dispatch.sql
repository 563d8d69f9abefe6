-- What version 1 may hold and version 2 cannot: one row for each kind, with the number of rows and the key of one of them.
-- Ids are keys of indexes, and PostgreSQL refuses an index row of more than 2,704 bytes: an id has 512 at most, on both
-- databases.

select 'attempt_id, run_id or status of more than 512 bytes in runtime_attempts' as what,
       count(*) as number, min(substr(attempt_id, 1, 60)) as example
  from {schema}.runtime_attempts
 where length(cast(attempt_id as blob)) > 512
    or length(cast(run_id as blob)) > 512
    or length(cast(status as blob)) > 512
 union all
select 'lease_id, attempt_id or worker_id of more than 512 bytes in runtime_leases' as what,
       count(*) as number, min(substr(lease_id, 1, 60)) as example
  from {schema}.runtime_leases
 where length(cast(lease_id as blob)) > 512
    or length(cast(attempt_id as blob)) > 512
    or length(cast(worker_id as blob)) > 512
 union all
select 'thread_id of more than 512 bytes in runtime_jobs' as what,
       count(*) as number, min(substr(thread_id, 1, 60)) as example
  from {schema}.runtime_jobs
 where length(cast(thread_id as blob)) > 512
 union all
select 'interrupt_id, thread_id, run_id or attempt_id of more than 512 bytes in runtime_interrupts' as what,
       count(*) as number, min(substr(interrupt_id, 1, 60)) as example
  from {schema}.runtime_interrupts
 where length(cast(interrupt_id as blob)) > 512
    or length(cast(thread_id as blob)) > 512
    or length(cast(run_id as blob)) > 512
    or length(cast(attempt_id as blob)) > 512
 union all
select 'worker_id, attempt_id, action_id or dedupe_token of more than 512 bytes in runtime_step_reports' as what,
       count(*) as number, cast(min(report_id) as text) as example
  from {schema}.runtime_step_reports
 where length(cast(worker_id as blob)) > 512
    or length(cast(attempt_id as blob)) > 512
    or length(cast(action_id as blob)) > 512
    or length(cast(dedupe_token as blob)) > 512
 union all
select 'key_id of more than 512 bytes in runtime_api_keys' as what,
       count(*) as number, min(substr(key_id, 1, 60)) as example
  from {schema}.runtime_api_keys
 where length(cast(key_id as blob)) > 512;
