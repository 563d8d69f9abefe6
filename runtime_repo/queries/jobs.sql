-- Jobs: one row for each thread, in the application's own words.
-- columns job: thread_id, status, created_at_ms, updated_at_ms

-- name: upsert
-- Say how a thread is doing; when it was first heard of stays.
insert into {schema}.runtime_jobs (thread_id, status, created_at_ms, updated_at_ms)
values ($1, $2, coalesce($3, {now_ms}), coalesce($3, {now_ms}))
    on conflict (thread_id) do update
   set status = excluded.status, updated_at_ms = excluded.updated_at_ms
returning {job};

-- name: find
select {job}
  from {schema}.runtime_jobs
 where thread_id = $1;

-- name: list
-- One page of all jobs, in the order of their ids, after the last id of the page before.
select {job}
  from {schema}.runtime_jobs
 where thread_id > $1
 order by thread_id
 limit $2;

-- name: list_by_status
-- As above, of one status. It is named twice, or PostgreSQL would take it for a constant, drop it from the order, and
-- walk through the ids past the jobs of others.
select {job}
  from {schema}.runtime_jobs
 where status in ($1, $1)
   and thread_id > $2
 order by status, thread_id
 limit $3;
