-- What an operator is told of a store. Each statement is asked by itself, whatever the schema's version and however much
-- of it is ours: one that cannot be answered leaves the others as they are.

-- name: server @postgres
select 'PostgreSQL ' || pg_catalog.split_part(pg_catalog.current_setting('server_version'), ' ', 1) as server;

-- name: server @sqlite
select 'SQLite ' || sqlite_version() as server;

-- name: size @postgres
-- What the database takes, in bytes.
select pg_catalog.pg_database_size(pg_catalog.current_database()) as bytes;

-- name: size @sqlite
select p.page_count * s.page_size as bytes
  from pragma_page_count as p cross join pragma_page_size as s;

-- name: tables @postgres
-- What each of our tables ($1, a JSON array) takes with its indexes, and about how many rows it has, as it was last
-- analyzed; the largest first.
select c.relname::pg_catalog.text as name, pg_catalog.pg_total_relation_size(c.oid) as bytes,
       case when c.reltuples >= 0::real then c.reltuples::bigint end as row_count
  from pg_catalog.pg_class as c
 where c.relnamespace = pg_catalog.to_regnamespace(e'{schema_text}')::pg_catalog.oid
   and c.relname = any (array(select named.name::pg_catalog.name
                                from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json)
                                     as named (name)))
   and c.relkind = 'r'
 order by bytes desc, name;

-- name: tables @sqlite
-- SQLite would have to read the whole file to know.
select value as name, null as bytes, null as row_count from json_each($1) where 0;

-- name: workers
-- Who holds leases: those who hold the most, at most $1 of them.
select worker_id, {pg_catalog}count(*) as leases,
       {pg_catalog}count(case when lease_expires_at_ms <= {now_ms} then 1 end) as expired,
       {pg_catalog}min(lease_expires_at_ms) as first_expiry_ms, {pg_catalog}max(heartbeat_at_ms) as heartbeat_ms
  from {schema}.runtime_leases
 group by worker_id
 order by leases desc, worker_id
 limit $1;

-- name: queues_without_names
-- As attempts.stats, where all that waits, is held and has ended is in one table, and in one queue without a name.
select 'default' as queue,
       {pg_catalog}count(case when status in ('queued', 'retry_backoff') and coalesce(retry_at_ms, 0) <= {now_ms}
                              then 1 end) as ready,
       {pg_catalog}count(case when status in ('queued', 'retry_backoff') and retry_at_ms > {now_ms}
                              then 1 end) as delayed,
       {pg_catalog}count(case when status in ('leased', 'running') then 1 end) as leased,
       null as oldest_age_ms
  from {schema}.runtime_attempts
 where status in ('queued', 'retry_backoff', 'leased', 'running');

-- name: counts
-- What somebody may have to look at, by index.
select (select {pg_catalog}count(*) from {schema}.runtime_finished
         where status = 'failed' and status <> 'completed') as failed,
       (select {pg_catalog}count(*) from {schema}.runtime_interrupts where status = 'pending') as pending_interrupts;

-- name: ended_lately
-- How many attempts have ended in the last so many milliseconds ($1), queue by queue; at most $2 of them are counted.
select queue, {pg_catalog}count(case when status = 'completed' then 1 end) as completed,
       {pg_catalog}count(case when status = 'failed' then 1 end) as failed,
       {pg_catalog}count(case when status = 'cancelled' then 1 end) as cancelled
  from (select f.status, (select a.queue from {schema}.runtime_attempts as a where a.attempt_id = f.attempt_id) as queue
          from (select attempt_id, status
                  from {schema}.runtime_finished
                 where finished_at_ms > {now_ms} - $1
                 order by finished_at_ms desc, attempt_id desc
                 limit $2) as f) as found
 where queue is not null
 group by queue
 order by queue;

-- name: now
select {now_ms} as now_ms;
