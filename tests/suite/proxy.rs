//! The proxy itself, with sqlx straight through it.

use sqlx::{Connection, Executor, PgConnection};

use crate::support::postgres::{Database, database};
use crate::support::proxy::{Fault, Proxy};

async fn table() -> (Database, Proxy) {
    let db = database().await;
    db.connect()
        .await
        .execute("CREATE TABLE public.t (id int8 PRIMARY KEY, n int8 NOT NULL DEFAULT 0)")
        .await
        .unwrap_or_else(|error| panic!("the daemon's role owns its database: {error}"));
    let proxy = Proxy::before(&db);
    (db, proxy)
}

async fn insert(conn: &mut PgConnection, id: i64) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    sqlx::query("INSERT INTO public.t (id) VALUES ($1)").bind(id).execute(&mut *tx).await?;
    tx.commit().await
}

async fn count(db: &Database) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM public.t").fetch_one(&mut db.connect().await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_cut_before_is_absent() {
    let (db, proxy) = table().await;
    let mut conn = db.connect_via(&proxy, "sop/test").await;
    let fault = proxy.arm(Fault::cut_before().committing("public.t"));
    insert(&mut conn, 1).await.expect_err("the client must not believe it");
    assert!(fault.hit().await.sql.eq_ignore_ascii_case("commit"));
    assert_eq!(count(&db).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_cut_after_is_there_and_unknown_to_the_client() {
    let (db, proxy) = table().await;
    let mut conn = db.connect_via(&proxy, "sop/test").await;
    let fault = proxy.arm(Fault::cut_after().committing("public.t").nth(2));
    insert(&mut conn, 1).await.expect("the first is not meant");
    insert(&mut conn, 2).await.expect_err("the client must not hear");
    assert_eq!(fault.hit().await.tag.as_deref(), Some("COMMIT"));
    assert_eq!(count(&db).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn statement_alone_commits_too() {
    let (db, proxy) = table().await;
    let mut conn = db.connect_via(&proxy, "sop/test").await;
    let fault = proxy.arm(Fault::cut_after().committing("public.t").paused());
    let client = tokio::spawn(async move {
        sqlx::query("INSERT INTO public.t (id) VALUES ($1)").bind(1_i64).execute(&mut conn).await.map(|_| ())
    });
    assert_eq!(fault.hit().await.tag.as_deref(), Some("INSERT 0 1"));
    assert_eq!(count(&db).await, 1, "the server has it while the client waits");
    assert!(!client.is_finished());
    fault.release();
    client.await.unwrap().expect_err("the client must not hear");
}

#[tokio::test(flavor = "multi_thread")]
async fn stall_keeps_the_row_lock_until_released() {
    let (db, proxy) = table().await;
    insert(&mut db.connect().await, 1).await.unwrap();
    let mut conn = db.connect_via(&proxy, "sop/test").await;
    let fault = proxy.arm(Fault::stall().on("UPDATE public.t"));
    let client = tokio::spawn(async move {
        sqlx::query("UPDATE public.t SET n = n + 1 WHERE id = $1").bind(1_i64).execute(&mut conn).await.map(|_| ())
    });
    fault.hit().await;
    let mut other = db.connect().await;
    other.execute("SET lock_timeout = '100ms'").await.unwrap();
    // The hit is reported when the server was sent the Execute; it may need a moment to take the lock.
    crate::support::until("the stalled statement to hold the lock", || async {
        let sql = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                   WHERE a.application_name = 'sop/test' AND a.datname = $1 AND l.mode = 'RowExclusiveLock'";
        sqlx::query_scalar::<_, i64>(sql).bind(&db.name).fetch_one(&mut db.connect().await).await.unwrap() > 0
    })
    .await;
    other.execute("UPDATE public.t SET n = n + 10").await.expect_err("the lock is held");
    fault.release();
    client.await.unwrap().expect("released, it ends well");
    other.execute("UPDATE public.t SET n = n + 10").await.expect("the lock is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn others_are_not_hit() {
    let (db, proxy) = table().await;
    let fault = proxy.arm(Fault::cut_before().committing("public.t"));
    let mut conn = db.connect_via(&proxy, "psql").await;
    insert(&mut conn, 1).await.expect("another application");
    assert!(!fault.fired());
}
