-- Attempts: the rows that workers compete for. Finishing writes are fenced on the attempt's own row, never through
-- leases: PostgreSQL re-checks only the row that it updates.

-- name: enqueue
-- Store an attempt, once: the same id again changes nothing and returns no row.
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no, status, retry_at_ms, queue, priority, payload_json, max_attempts, enqueued_at_ms)
values ($1, $2, 1, 'queued', $3, $4, $5, $6, $7, coalesce($8, {now_ms}))
    on conflict (attempt_id) do nothing
returning attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
          enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error;

-- name: find
select attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
       enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error
  from {schema}.runtime_attempts
 where attempt_id = $1;

-- name: list_by_run
-- One page of a run, in the order of ids, after the last id of the page before.
select attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
       enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error
  from {schema}.runtime_attempts
 where run_id = $1
   and attempt_id > $2
 order by attempt_id
 limit $3;

-- name: complete @postgres
-- Finish the attempt, while it is still this token's to finish, and end its lease.
with done as (
    update {schema}.runtime_attempts
       set status         = 'completed',
           result_json    = $3,
           error          = null,
           finished_at_ms = coalesce($4, {now_ms})
     where attempt_id    = $1
       and lease_version = $2
       and status in ('leased', 'running')
    returning attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version,
              worker_id, enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id in (select attempt_id from done)
)
select attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
       enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error
  from done;

-- name: complete @sqlite
-- As above, in two statements of one transaction: SQLite has no data-modifying common table expressions.
delete from {schema}.runtime_leases
 where attempt_id = $1
   and version    = $2;
update {schema}.runtime_attempts
   set status         = 'completed',
       result_json    = $3,
       error          = null,
       finished_at_ms = coalesce($4, {now_ms})
 where attempt_id    = $1
   and lease_version = $2
   and status in ('leased', 'running')
returning attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
          enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error;

-- name: fail @postgres
-- Record a failed try: try again after a delay ($4, NULL is never), unless this was the last one.
with failed as (
    update {schema}.runtime_attempts
       set status         = case when $4::bigint is null or attempt_no >= max_attempts then 'failed' else 'retry_backoff' end,
           attempt_no     = case when $4::bigint is null or attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
           retry_at_ms    = case when attempt_no >= max_attempts then null else coalesce($5, {now_ms}) + $4::bigint end,
           finished_at_ms = case when $4::bigint is null or attempt_no >= max_attempts then coalesce($5, {now_ms}) end,
           error          = $3
     where attempt_id    = $1
       and lease_version = $2
       and status in ('leased', 'running')
    returning attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version,
              worker_id, enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error
), ended as (
    delete from {schema}.runtime_leases
     where attempt_id in (select attempt_id from failed)
)
select attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
       enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error
  from failed;

-- name: fail @sqlite
-- As above, in two statements of one transaction.
delete from {schema}.runtime_leases
 where attempt_id = $1
   and version    = $2;
update {schema}.runtime_attempts
   set status         = case when $4 is null or attempt_no >= max_attempts then 'failed' else 'retry_backoff' end,
       attempt_no     = case when $4 is null or attempt_no >= max_attempts then attempt_no else attempt_no + 1 end,
       retry_at_ms    = case when attempt_no >= max_attempts then null else coalesce($5, {now_ms}) + $4 end,
       finished_at_ms = case when $4 is null or attempt_no >= max_attempts then coalesce($5, {now_ms}) end,
       error          = $3
 where attempt_id    = $1
   and lease_version = $2
   and status in ('leased', 'running')
returning attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id,
          enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error;
