-- Control: the operator's switches, a row for each that is set. 'quiesce' stops every claim, 'pause:' and a queue's name
-- those from that queue; 'oldest' is the oldest release, by the version that it supports, which can still run beside the
-- schema that is there. A release that knows none of them goes by the ledger alone.
-- columns switch: name, value_json, updated_at_ms

-- part: is_stopped
-- Whether the operator lets nobody claim from the queue named.value. Each asks for one row: PostgreSQL would join what
-- EXISTS asks, and SQLite sort what IN does.
((select 1 from {schema}.runtime_control where name = 'quiesce') is not null
                  or (select 1 from {schema}.runtime_control where name = 'pause:' || named.value) is not null)

-- part: is_outdated
-- Whether a migration is recorded that this release does not know, and none lets it run all the same. The order leads
-- PostgreSQL to the ledger's key.
((select version
                     from {schema}.runtime_schema_migrations
                    where version > {supported}
                    order by version desc
                    limit 1) is not null
                  and (select 1
                         from {schema}.runtime_control
                        where name = 'oldest'
                          and value_json in ({known})) is null)

-- part: is_open
-- Whether a claim of this release may take anything from the queue named.value.
not {is_stopped}
              and not {is_outdated}

-- name: set
-- Set a switch. What is set already stays as it is since then, but for what ($2) it says, if that is given.
insert into {schema}.runtime_control ({switch})
values ($1, coalesce(cast($2 as {pg_catalog}text), 'null'), coalesce($3, {now_ms}))
    on conflict (name) do update
   set value_json = coalesce(cast($2 as {pg_catalog}text), runtime_control.value_json)
returning {switch};

-- name: clear
delete from {schema}.runtime_control
 where name = $1
returning name;

-- name: list
-- All that is set, paused queues by their names.
select {switch}
  from {schema}.runtime_control
 order by name;

-- name: allow
-- The oldest release ($1) that can run beside the schema as it is now.
insert into {schema}.runtime_control ({switch})
values ('oldest', $1, {now_ms})
    on conflict (name) do update
   set value_json = excluded.value_json, updated_at_ms = excluded.updated_at_ms;

-- name: oldest
-- The oldest release that can run beside the schema.
select value_json
  from {schema}.runtime_control
 where name = 'oldest';

-- name: outdated
-- The version of the schema, where this release may not claim beside it, and which may.
select (select version
          from {schema}.runtime_schema_migrations
         order by version desc
         limit 1) as found,
       {supported} as supported,
       (select value_json from {schema}.runtime_control where name = 'oldest') as oldest
 where {is_outdated};

-- name: holders
-- Who holds leases: how many, one of the attempts, and when the last of them runs out. It reads all that is held.
select worker_id, {pg_catalog}count(*) as leases, {pg_catalog}min(attempt_id) as attempt_id,
       {pg_catalog}max(lease_expires_at_ms) as expires_at_ms
  from {schema}.runtime_leases
 group by worker_id
 order by leases desc, worker_id;

-- name: claiming @postgres
-- Who has begun what may be a claim: every transaction that writes attempts, or those of a JSON array ($1) that still go
-- on. A statement locks its tables before it looks at their rows, and keeps the locks to the end of its transaction: so
-- whoever has not seen a switch that is committed is among them. A lock of our own would hold up everybody's writes, and
-- wait for autovacuum.
select l.virtualtransaction as id, coalesce(a.pid, 0) as pid, coalesce(a.application_name, '') as application_name,
       a.usename::pg_catalog.text as user_name,
       case when a.client_port = -1 then 'local' else pg_catalog.host(a.client_addr) end as client_address,
       extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::double precision as transaction_age,
       extract(epoch from pg_catalog.clock_timestamp() - a.backend_start)::double precision as session_age
  from pg_catalog.pg_locks as l
  left join pg_catalog.pg_stat_activity as a on a.pid = l.pid
 where l.locktype = 'relation'
   and l.mode = 'RowExclusiveLock'
   and l.granted
   and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
   and l.relation = pg_catalog.to_regclass(e'{schema_text}.runtime_attempts')::pg_catalog.oid
   and l.pid is distinct from pg_catalog.pg_backend_pid()
   and ($1::pg_catalog.text is null
        or l.virtualtransaction in (
               select x from pg_catalog.json_array_elements_text($1::pg_catalog.text::pg_catalog.json) as y (x)));

-- name: claiming @sqlite
-- Nobody: whoever had begun has written before the switch was, for there is one writer at a time.
select null as id
 where false;
