-- What version 1 may hold and version 2 cannot: one row for each kind, with the number of rows and the key of one of them.
-- Ids are keys of indexes, and PostgreSQL refuses an index row of more than 2,704 bytes: an id or a name has at most 512
-- characters and 1,024 bytes of UTF-8, the id of an attempt or an interrupt 1,536, on both databases. An empty key could
-- be named by no verb, and is before the beginning of every list. The table of leases is made anew with the columns that it
-- has had, and what another program has added to it would be lost.

select 'attempt_id, run_id or status of more than 512 characters or too many bytes in runtime_attempts' as what,
       count(*) as number, min(substr(attempt_id, 1, 60)) as example
  from {schema}.runtime_attempts
 where length(attempt_id) > 512
    or length(cast(attempt_id as blob)) > 1536
    or length(run_id) > 512
    or length(cast(run_id as blob)) > 1024
    or length(status) > 512
    or length(cast(status as blob)) > 1024
 union all
select 'lease_id, attempt_id or worker_id of more than 512 characters or too many bytes in runtime_leases' as what,
       count(*) as number, min(substr(lease_id, 1, 60)) as example
  from {schema}.runtime_leases
 where length(lease_id) > 512
    or length(cast(lease_id as blob)) > 1024
    or length(attempt_id) > 512
    or length(cast(attempt_id as blob)) > 1536
    or length(worker_id) > 512
    or length(cast(worker_id as blob)) > 1024
 union all
select 'thread_id of more than 512 characters or too many bytes in runtime_jobs' as what,
       count(*) as number, min(substr(thread_id, 1, 60)) as example
  from {schema}.runtime_jobs
 where length(thread_id) > 512
    or length(cast(thread_id as blob)) > 1024
 union all
select 'interrupt_id, thread_id, run_id or attempt_id of more than 512 characters or too many bytes in runtime_interrupts' as what,
       count(*) as number, min(substr(interrupt_id, 1, 60)) as example
  from {schema}.runtime_interrupts
 where length(interrupt_id) > 512
    or length(cast(interrupt_id as blob)) > 1536
    or length(thread_id) > 512
    or length(cast(thread_id as blob)) > 1024
    or length(run_id) > 512
    or length(cast(run_id as blob)) > 1024
    or length(attempt_id) > 512
    or length(cast(attempt_id as blob)) > 1536
 union all
select 'worker_id, attempt_id, action_id or dedupe_token of more than 512 characters or too many bytes in runtime_step_reports' as what,
       count(*) as number, cast(min(report_id) as text) as example
  from {schema}.runtime_step_reports
 where length(worker_id) > 512
    or length(cast(worker_id as blob)) > 1024
    or length(attempt_id) > 512
    or length(cast(attempt_id as blob)) > 1536
    or length(action_id) > 512
    or length(cast(action_id as blob)) > 1024
    or length(dedupe_token) > 512
    or length(cast(dedupe_token as blob)) > 1024
 union all
select 'key_id of more than 512 characters or too many bytes in runtime_api_keys' as what,
       count(*) as number, min(substr(key_id, 1, 60)) as example
  from {schema}.runtime_api_keys
 where length(key_id) > 512
    or length(cast(key_id as blob)) > 1024
 union all
select 'an empty attempt_id in runtime_attempts' as what, count(*) as number, min(attempt_id) as example
  from {schema}.runtime_attempts
 where attempt_id = ''
 union all
select 'an empty lease_id in runtime_leases' as what, count(*) as number, min(lease_id) as example
  from {schema}.runtime_leases
 where lease_id = ''
 union all
select 'an empty thread_id in runtime_jobs' as what, count(*) as number, min(thread_id) as example
  from {schema}.runtime_jobs
 where thread_id = ''
 union all
select 'an empty interrupt_id in runtime_interrupts' as what, count(*) as number, min(interrupt_id) as example
  from {schema}.runtime_interrupts
 where interrupt_id = ''
 union all
select 'an empty key_id in runtime_api_keys' as what, count(*) as number, min(key_id) as example
  from {schema}.runtime_api_keys
 where key_id = ''
 union all
select 'no place to go, for the table runtime_leases is made anew: a column of another program''s' as what,
       count(*) as number, min(name) as example
  from pragma_table_xinfo('runtime_leases', '{schema}')
 where lower(name) not in (
           'lease_id', 'attempt_id', 'worker_id', 'lease_expires_at_ms', 'heartbeat_at_ms', 'version');
