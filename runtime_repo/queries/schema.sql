-- What boot reads and writes. IF NOT EXISTS appears nowhere: on PostgreSQL it needs CREATE even where the object exists.

-- name: create_namespace @postgres
create schema {schema};

-- name: create_ledger @postgres
-- One row for every migration that was applied, written in the migration's own transaction.
create table {schema}.runtime_schema_migrations (
    version       integer primary key,
    name          text not null,
    applied_at_ms bigint not null
);

-- name: create_ledger @sqlite
-- As above: milliseconds need BIGINT on PostgreSQL, where INTEGER has 32 bits.
create table {schema}.runtime_schema_migrations (
    version       integer primary key,
    name          text not null,
    applied_at_ms integer not null
);

-- name: record
insert into {schema}.runtime_schema_migrations (version, name, applied_at_ms)
values ($1, $2, {now_ms});

-- name: look @sqlite
-- The ledger and, beside each of its rows, the text that SQLite keeps of all that may be ours (no name of ours is before
-- $1 or after $2): one statement for a warm boot, which recognizes the text.
select version, name, applied_at_ms,
       (select group_concat(sql, char(10))
          from {schema}.sqlite_schema
         where tbl_name between $1 and $2) as text
  from {schema}.runtime_schema_migrations;

-- name: columns @sqlite
-- Every column of ours, for a catalog whose text is not known. An index takes a table's name.
select t.type as kind, t.name as "table", t.sql, c.name, c.type, c."notnull", c.dflt_value, c.pk, c.hidden
  from {schema}.sqlite_schema as t
  left join pragma_table_xinfo(iif(t.type = 'index', null, t.name), '{schema}') as c
 where t.type in ('table', 'view', 'index')
   and instr($1, '"' || lower(t.name) || '"')
 order by t.name, c.cid;

-- name: indexes @sqlite
-- Every key column of every index of ours; the predicate is only to be read in the index's text.
select t.name as "table", i.name, i."unique", i.origin, i.partial, k.name as "column", k."desc", k.coll, s.sql
  from {schema}.sqlite_schema as t
  join pragma_index_list(t.name, '{schema}') as i
  join pragma_index_xinfo(i.name, '{schema}') as k
  left join {schema}.sqlite_schema as s on s.type = 'index' and s.name = i.name
 where t.type = 'table'
   and instr($1, '"' || lower(t.name) || '"')
   and k.key
 order by t.name, i.name, k.seqno;

-- name: look @postgres
-- The ledger and the raw catalog text of our relations ($1, qualified names), by which a warm boot recognizes it: one
-- statement. Its cost is planning and page faults on a fresh connection, so it has no joins and makes no records, and
-- every operator and type is the one that an index of the catalogs has (an oid compared to a regclass costs 0.2 ms).
-- pg_get_expr locks the table that it is about, so while somebody changes that table the statement gives up soon.
select array(select concat_ws(' ', version, applied_at_ms, name) from {schema}.runtime_schema_migrations) as ledger,
       array(select concat_ws(' ', array_position(o, attrelid), attnum, attname, atttypid, atttypmod, attnotnull,
                              attidentity, attgenerated)
               from pg_catalog.pg_attribute where attrelid = any (o) and attnum > 0) as columns,
       array(select concat_ws(' ', array_position(o, adrelid), adnum, pg_get_expr(adbin, adrelid))
               from pg_catalog.pg_attrdef where adrelid = any (o)) as defaults,
       array(select concat_ws(' ', indexrelid::regclass, array_position(o, indrelid), indisunique, indisprimary,
                              indisvalid, indisready, indislive, indimmediate, indnkeyatts, indkey, indoption, indclass,
                              indcollation, pg_get_expr(indexprs, indrelid), pg_get_expr(indpred, indrelid))
               from pg_catalog.pg_index where indrelid = any (o)) as indexes
  from (select array(select to_regclass(x)::oid from unnest($1::text[]) as x) as o,
               set_config('lock_timeout', '100ms', true) offset 0) as bounded;

-- name: taken @postgres
-- Whether the schema is there ($1, its quoted name), and whether anything in it bears one of our names ($2, all
-- qualified). To ask by name needs no plan, which halves the cost on a fresh connection.
select to_regnamespace($1) is not null as namespace,
       exists (select from unnest($2::text[]) as x where to_regclass(x) is not null or to_regtype(x) is not null) as taken;

-- name: catalog @postgres
-- Every relation of the schema $1 that bears one of our names ($2), column by column and index by index, for a catalog
-- whose text is not known. A table takes a type's name too, so types count. A number that a column's own sequence
-- provides is as good as an identity. One row without a name is a schema that holds nothing of ours; no row is none.
select c.relname, c.relkind,
       (select json_agg(json_build_array(
                   a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated <> '',
                   a.attidentity <> ''
                   or pg_get_expr(d.adbin, d.adrelid) = format('nextval(%L::regclass)', pg_get_serial_sequence(
                          quote_ident(n.nspname) || '.' || quote_ident(c.relname), a.attname)::regclass),
                   pg_get_expr(d.adbin, d.adrelid)) order by a.attnum)
          from pg_catalog.pg_attribute as a
          left join pg_catalog.pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
         where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)::text as columns,
       (select json_agg(json_build_array(
                   x.relname, i.indisprimary, i.indisunique, i.indimmediate,
                   i.indisvalid and i.indisready and i.indislive, i.indkey::int2[], pg_get_indexdef(i.indexrelid)))
          from pg_catalog.pg_index as i
          join pg_catalog.pg_class as x on x.oid = i.indexrelid
         where i.indrelid = c.oid)::text as indexes
  from pg_catalog.pg_namespace as n
  left join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname = any ($2::text[])
 where n.nspname = $1
 union all
select t.typname, 't', null, null
  from pg_catalog.pg_namespace as n
  join pg_catalog.pg_type as t on t.typnamespace = n.oid and t.typrelid = 0 and t.typname = any ($2::text[])
 where n.nspname = $1;

-- name: lock_holder @postgres
-- Who is in the way: a migration that has been running for a while, otherwise the oldest transaction that holds a lock
-- on one of our tables, or on the migration lock. An advisory key is the same in every database.
select a.pid, coalesce(a.application_name, '') as application_name, host(a.client_addr) as client_address,
       extract(epoch from clock_timestamp() - coalesce(a.xact_start, a.backend_start, clock_timestamp()))::float8
           as transaction_age
  from pg_catalog.pg_locks as l
  join pg_catalog.pg_stat_activity as a on a.pid = l.pid
 where l.granted
   and l.pid <> pg_backend_pid()
   and l.database = (select oid from pg_catalog.pg_database where datname = current_database())
   and (   (l.locktype = 'advisory' and l.classid::bigint = $1::int and l.objsubid = 2
            and l.objid::bigint = $2::int & 4294967295::bigint)
        or (l.locktype = 'relation' and l.relation in (
               select c.oid from pg_catalog.pg_class as c
                where c.relnamespace = (select oid from pg_catalog.pg_namespace where nspname = $3))))
 order by l.locktype = 'advisory' and a.xact_start < clock_timestamp() - interval '1 second' desc, a.xact_start
 limit 1;

-- name: tell @postgres
-- Tell of queues ($2, a JSON array) on a channel ($1), at the commit of this transaction.
select pg_notify($1, named.queue) as told
  from json_array_elements_text($2::text::json) as named (queue);

-- name: tell_now @postgres
-- As above, in a transaction of its own, whose commit need not outlive a crash.
select pg_notify($1, named.queue) as told, set_config('synchronous_commit', 'off', true) as forgetful
  from json_array_elements_text($2::text::json) as named (queue);
