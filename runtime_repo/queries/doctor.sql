-- What a doctor asks: of this role, of the server or the file, and of what stands around our tables. It writes nothing.

-- name: server @postgres
-- How the server keeps what is committed, whose clock it has, and who asks.
select pg_catalog.current_setting('fsync') as fsync,
       pg_catalog.current_setting('full_page_writes') as full_page_writes,
       pg_catalog.current_setting('synchronous_commit') as synchronous_commit,
       pg_catalog.current_setting('autovacuum') as autovacuum,
       pg_catalog.current_setting('default_transaction_isolation') as isolation,
       pg_catalog.current_setting('default_transaction_read_only') as read_only,
       pg_catalog.current_setting('wal_level') as wal_level,
       pg_catalog.pg_is_in_recovery() as is_standby,
       current_user::pg_catalog.text as role,
       (extract(epoch from pg_catalog.clock_timestamp()) * 1000::numeric)::bigint as now_ms;

-- name: rights @postgres
-- Whether the schema is this role's to create in, which of our tables it owns, and which of the privileges that a worker
-- needs ($1, a JSON array of tables and privileges) it lacks.
select pg_catalog.has_schema_privilege(n.oid, 'create') as may_create,
       not exists (select from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json)
                               as x (name pg_catalog.text, privilege pg_catalog.text)
                     join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname::pg_catalog.text = x.name
                    where not pg_catalog.pg_has_role(c.relowner, 'usage')) as is_owner,
       array(select x.privilege || ' on ' || x.name
               from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json)
                    as x (name pg_catalog.text, privilege pg_catalog.text)
               join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname::pg_catalog.text = x.name
              where not pg_catalog.has_table_privilege(c.oid, x.privilege)
              order by 1) as lacking,
       array(select pg_catalog.pg_get_serial_sequence(
                        pg_catalog.quote_ident(n.nspname::pg_catalog.text) || '.'
                        || pg_catalog.quote_ident(c.relname::pg_catalog.text), a.attname::pg_catalog.text)
               from pg_catalog.json_to_recordset($1::pg_catalog.text::pg_catalog.json)
                    as x (name pg_catalog.text, privilege pg_catalog.text)
               join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname::pg_catalog.text = x.name
               join pg_catalog.pg_attribute as a on a.attrelid = c.oid and a.attidentity = '' and a.atthasdef
              where x.privilege = 'insert'
                and not pg_catalog.has_sequence_privilege(
                        pg_catalog.pg_get_serial_sequence(
                            pg_catalog.quote_ident(n.nspname::pg_catalog.text) || '.'
                            || pg_catalog.quote_ident(c.relname::pg_catalog.text), a.attname::pg_catalog.text), 'usage')
              order by 1) as sequences
  from pg_catalog.pg_namespace as n
 where n.nspname = $2;

-- name: backend @postgres
select pg_catalog.pg_backend_pid() as pid;

-- name: transactions @postgres
-- Transactions of this database that have been open for longer than so many seconds ($1), the oldest first. Of another
-- user's session a role without pg_read_all_stats is not told when it began, but which one holds back the most.
select a.pid, coalesce(a.application_name, '') as application_name, a.usename::pg_catalog.text as user_name,
       coalesce(a.state, 'unknown') as state,
       extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::double precision as age
  from pg_catalog.pg_stat_activity as a
 where a.datname = pg_catalog.current_database()
   and a.pid <> pg_catalog.pg_backend_pid()
   and a.xact_start < pg_catalog.clock_timestamp() - $1::double precision * interval '1 second'
 order by a.xact_start
 limit 10;

-- name: prepared @postgres
-- As above, of those that were prepared and wait for their second commit.
select gid, owner::pg_catalog.text as user_name,
       extract(epoch from pg_catalog.clock_timestamp() - prepared)::double precision as age
  from pg_catalog.pg_prepared_xacts
 where database = pg_catalog.current_database()
   and prepared < pg_catalog.clock_timestamp() - $1::double precision * interval '1 second'
 order by prepared
 limit 10;

-- name: vacuumed @postgres
-- Of our tables ($2, a JSON array) in the schema $1 how many rows are alive and dead, and whether autovacuum may come.
select s.relname::pg_catalog.text as name, s.n_live_tup as alive, s.n_dead_tup as dead,
       extract(epoch from pg_catalog.clock_timestamp() - greatest(s.last_vacuum, s.last_autovacuum))::double precision
           as since,
       exists (select from pg_catalog.unnest(c.reloptions) as x
                where x in ('autovacuum_enabled=false', 'autovacuum_enabled=off')) as is_off
  from pg_catalog.pg_stat_all_tables as s
  join pg_catalog.pg_class as c on c.oid = s.relid
 where s.schemaname = $1
   and s.relname = any (array(select named.name::pg_catalog.name
                                from pg_catalog.json_array_elements_text($2::pg_catalog.text::pg_catalog.json)
                                     as named (name)))
 order by s.relname;

-- name: invalid @postgres
-- The indexes on our tables ($2, a JSON array) in the schema $1 that a concurrent build has left behind unfinished.
select x.relname::pg_catalog.text as name, c.relname::pg_catalog.text as on_table
  from pg_catalog.pg_namespace as n
  join pg_catalog.pg_class as c on c.relnamespace = n.oid
  join pg_catalog.pg_index as i on i.indrelid = c.oid
  join pg_catalog.pg_class as x on x.oid = i.indexrelid
 where n.nspname = $1
   and c.relname = any (array(select named.name::pg_catalog.name
                                from pg_catalog.json_array_elements_text($2::pg_catalog.text::pg_catalog.json)
                                     as named (name)))
   and not (i.indisvalid and i.indisready and i.indislive)
   and not exists (select from pg_catalog.pg_stat_progress_create_index as p where p.index_relid = i.indexrelid)
 order by x.relname;

-- name: keys @postgres
-- What the primary key of each table of the schema $1 is called.
select c.relname::pg_catalog.text as name, k.conname::pg_catalog.text as key
  from pg_catalog.pg_namespace as n
  join pg_catalog.pg_class as c on c.relnamespace = n.oid
  join pg_catalog.pg_constraint as k on k.conrelid = c.oid and k.contype = 'p'
 where n.nspname = $1;

-- name: bases @postgres
-- What the domains of columns in the schema $1 are in the end.
with recursive domains (id, name, attname, base) as (
       select t.oid, c.relname, a.attname, t.typbasetype
         from pg_catalog.pg_namespace as n
         join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relkind = 'r'
         join pg_catalog.pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         join pg_catalog.pg_type as t on t.oid = a.atttypid and t.typtype = 'd'
        where n.nspname = $1
        union all
       select t.oid, d.name, d.attname, t.typbasetype
         from domains as d
         join pg_catalog.pg_type as t on t.oid = d.base and t.typtype = 'd')
select d.name::pg_catalog.text as name, d.attname::pg_catalog.text as attname,
       pg_catalog.format_type(d.base, null) as base
  from domains as d
  join pg_catalog.pg_type as t on t.oid = d.base and t.typtype <> 'd';

-- name: holding @postgres
-- Which table of the schema $1 has the index of a name.
select x.relname::pg_catalog.text as name, c.relname::pg_catalog.text as on_table, null::pg_catalog.text as definition
  from pg_catalog.pg_namespace as n
  join pg_catalog.pg_class as x on x.relnamespace = n.oid
  join pg_catalog.pg_index as i on i.indexrelid = x.oid
  join pg_catalog.pg_class as c on c.oid = i.indrelid
 where n.nspname = $1;

-- name: holding @sqlite
-- Which table has the index of a name, and its text.
select name, tbl_name as on_table, sql as definition
  from {schema}.sqlite_schema
 where type = 'index';

-- name: file @sqlite
-- How the file keeps what is committed, how much of it is free, and its clock.
select (select journal_mode from pragma_journal_mode) as journal_mode,
       (select synchronous from pragma_synchronous) as synchronous,
       (select page_count from pragma_page_count) as pages,
       (select freelist_count from pragma_freelist_count) as free_pages,
       (select page_size from pragma_page_size) as page_size,
       {now_ms} as now_ms;
