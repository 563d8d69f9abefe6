-- What version 1 may hold and version 2 cannot: one row for each kind, with the number of rows and the key of one of them.
-- Ids are keys of indexes, and PostgreSQL refuses an index row of more than 2,704 bytes: an id or a name has at most 512
-- characters and 1,024 bytes of UTF-8, the id of an attempt or an interrupt 1,536, on both databases. An empty key could
-- be named by no verb, and is before the beginning of every list.

select 'attempt_id, run_id or status of more than 512 characters or too many bytes in runtime_attempts' as what,
       pg_catalog.count(*) as number, pg_catalog.min(pg_catalog.left(attempt_id, 60)) as example
  from {schema}.runtime_attempts
 where pg_catalog.length(attempt_id) > 512
    or pg_catalog.octet_length(attempt_id) > 1536
    or pg_catalog.length(run_id) > 512
    or pg_catalog.octet_length(run_id) > 1024
    or pg_catalog.length(status) > 512
    or pg_catalog.octet_length(status) > 1024
 union all
select 'lease_id, attempt_id or worker_id of more than 512 characters or too many bytes in runtime_leases' as what,
       pg_catalog.count(*) as number, pg_catalog.min(pg_catalog.left(lease_id, 60)) as example
  from {schema}.runtime_leases
 where pg_catalog.length(lease_id) > 512
    or pg_catalog.octet_length(lease_id) > 1024
    or pg_catalog.length(attempt_id) > 512
    or pg_catalog.octet_length(attempt_id) > 1536
    or pg_catalog.length(worker_id) > 512
    or pg_catalog.octet_length(worker_id) > 1024
 union all
select 'thread_id of more than 512 characters or too many bytes in runtime_jobs' as what,
       pg_catalog.count(*) as number, pg_catalog.min(pg_catalog.left(thread_id, 60)) as example
  from {schema}.runtime_jobs
 where pg_catalog.length(thread_id) > 512
    or pg_catalog.octet_length(thread_id) > 1024
 union all
select 'interrupt_id, thread_id, run_id or attempt_id of more than 512 characters or too many bytes in runtime_interrupts' as what,
       pg_catalog.count(*) as number, pg_catalog.min(pg_catalog.left(interrupt_id, 60)) as example
  from {schema}.runtime_interrupts
 where pg_catalog.length(interrupt_id) > 512
    or pg_catalog.octet_length(interrupt_id) > 1536
    or pg_catalog.length(thread_id) > 512
    or pg_catalog.octet_length(thread_id) > 1024
    or pg_catalog.length(run_id) > 512
    or pg_catalog.octet_length(run_id) > 1024
    or pg_catalog.length(attempt_id) > 512
    or pg_catalog.octet_length(attempt_id) > 1536
 union all
select 'worker_id, attempt_id, action_id or dedupe_token of more than 512 characters or too many bytes in runtime_step_reports' as what,
       pg_catalog.count(*) as number, pg_catalog.min(report_id)::pg_catalog.text as example
  from {schema}.runtime_step_reports
 where pg_catalog.length(worker_id) > 512
    or pg_catalog.octet_length(worker_id) > 1024
    or pg_catalog.length(attempt_id) > 512
    or pg_catalog.octet_length(attempt_id) > 1536
    or pg_catalog.length(action_id) > 512
    or pg_catalog.octet_length(action_id) > 1024
    or pg_catalog.length(dedupe_token) > 512
    or pg_catalog.octet_length(dedupe_token) > 1024
 union all
select 'key_id of more than 512 characters or too many bytes in runtime_api_keys' as what,
       pg_catalog.count(*) as number, pg_catalog.min(pg_catalog.left(key_id, 60)) as example
  from {schema}.runtime_api_keys
 where pg_catalog.length(key_id) > 512
    or pg_catalog.octet_length(key_id) > 1024
 union all
select 'an empty attempt_id in runtime_attempts' as what, pg_catalog.count(*) as number, pg_catalog.min(attempt_id) as example
  from {schema}.runtime_attempts
 where attempt_id = ''
 union all
select 'an empty lease_id in runtime_leases' as what, pg_catalog.count(*) as number, pg_catalog.min(lease_id) as example
  from {schema}.runtime_leases
 where lease_id = ''
 union all
select 'an empty thread_id in runtime_jobs' as what, pg_catalog.count(*) as number, pg_catalog.min(thread_id) as example
  from {schema}.runtime_jobs
 where thread_id = ''
 union all
select 'an empty interrupt_id in runtime_interrupts' as what, pg_catalog.count(*) as number, pg_catalog.min(interrupt_id) as example
  from {schema}.runtime_interrupts
 where interrupt_id = ''
 union all
select 'an empty key_id in runtime_api_keys' as what, pg_catalog.count(*) as number, pg_catalog.min(key_id) as example
  from {schema}.runtime_api_keys
 where key_id = '';
