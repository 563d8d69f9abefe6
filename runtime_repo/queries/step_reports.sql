-- Step reports: what the holder of a lease did, each stored once. They are never changed.
-- columns report: report_id, worker_id, attempt_id, action_id, status, dedupe_token, payload_json, lease_version,
--  created_at_ms

-- name: record @postgres
-- Store a report, once, while the attempt is this token's: the same dedupe token again changes nothing and returns no
-- row. The attempt's own row is locked, for PostgreSQL re-checks what it locks: whoever waited here behind a requeue is
-- refused. The lock is that of an update, so reports of one attempt are numbered in the order in which they commit, and
-- nobody who has read a page can miss one; with a shared lock two holders that then finish would be a deadlock.
with held as (
    select attempt_id, lease_version
      from {schema}.runtime_attempts
     where attempt_id    = $1
       and lease_version = $2
       and lease_id      = $9
       and status in ('leased', 'running')
       for no key update
)
insert into {schema}.runtime_step_reports
       (worker_id, attempt_id, action_id, status, dedupe_token, payload_json, lease_version, created_at_ms)
select $3, attempt_id, $4, $5, $6, $7, lease_version, coalesce($8, {now_ms})
  from held
    on conflict (attempt_id, dedupe_token) do nothing
returning {report};

-- name: record @sqlite
-- As above: here nobody else is writing.
insert into {schema}.runtime_step_reports
       (worker_id, attempt_id, action_id, status, dedupe_token, payload_json, lease_version, created_at_ms)
select $3, attempt_id, $4, $5, $6, $7, lease_version, coalesce($8, {now_ms})
  from {schema}.runtime_attempts
 where attempt_id    = $1
   and lease_version = $2
   and lease_id      = $9
   and status in ('leased', 'running')
    on conflict (attempt_id, dedupe_token) do nothing
returning {report};

-- name: recorded
-- The report that is stored under a dedupe token ($3), for the lease that stored it or that holds the attempt now. What
-- is stored may not be on any standby yet, so the answer waits like a write: reports are never changed, so it locks the
-- attempt. Where another history gave the same token to another lease, that one's reports are not this one's.
with attempt as (
    select attempt_id, lease_version, lease_id, status
      from {schema}.runtime_attempts
     where attempt_id = $1
       {durably}
)
select {report_of_r}
  from {schema}.runtime_step_reports as r
  left join attempt as a on a.attempt_id = r.attempt_id
 where r.attempt_id   = $1
   and r.dedupe_token = $3
   and (a.lease_version = $2 and a.lease_id = $4 and a.status in ('leased', 'running')
        or r.lease_version = $2 and (a.attempt_id is null or a.lease_version <> $2 or a.lease_id = $4));

-- name: list
-- One page of an attempt's reports, in the order of their numbers, after the last number of the page before. Ordered by
-- an expression, for in the order of the primary key PostgreSQL's generic plan reads the reports of all attempts.
select {report}
  from {schema}.runtime_step_reports
 where attempt_id = $1
   and report_id + 0 > $2
 order by report_id + 0
 limit $3;
