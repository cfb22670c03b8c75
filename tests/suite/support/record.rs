//! What must hold of every record, whatever was done to the daemons that wrote it.

use std::collections::BTreeMap;

use sop::kernel::crypto::{self, Domain};
use sop::ledger::merkle::Frontier;
use sop::ledger::{Touch, entry};
use sqlx::{PgConnection, Row};

use super::postgres::Database;

/// Acknowledged writes: key to the indexes it was told.
pub type Acknowledged = BTreeMap<String, Vec<i64>>;

/// Checks the record of a database against itself; how many entries it has.
pub async fn check(db: &Database) -> i64 {
    check_on(&mut db.connect().await).await
}

/// The same on any connection.
pub async fn check_on(conn: &mut PgConnection) -> i64 {
    // Of one moment: a daemon that runs may write an entry of its own at any time.
    sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").execute(&mut *conn).await.unwrap();
    let entries = check_at(&mut *conn).await;
    sqlx::raw_sql("COMMIT").execute(conn).await.unwrap();
    entries
}

async fn check_at(conn: &mut PgConnection) -> i64 {
    let head = sqlx::query("SELECT index, root FROM ledger.head").fetch_one(&mut *conn).await.unwrap();
    let (index, root): (i64, Vec<u8>) = (head.get("index"), head.get("root"));
    let rows = sqlx::query(
        "SELECT e.index, e.leaf, e.hash, e.touched, d.salt, d.details, d.segment FROM ledger.entries e JOIN ledger.details d USING (index) ORDER BY index",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    let mut frontier = Frontier::default();
    let mut changed = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        assert_eq!(row.get::<i64, _>("index"), i64::try_from(at).unwrap(), "an index is missing or doubled");
        let (leaf, hash): (Vec<u8>, Vec<u8>) = (row.get("leaf"), row.get("hash"));
        assert_eq!(crypto::hash(Domain::Leaf, &[&leaf])[..], hash[..], "leaf {at}");
        let (salt, details): (Vec<u8>, Vec<u8>) = (row.get("salt"), row.get("details"));
        let segment: Option<Vec<u8>> = row.get("segment");
        let segment = segment.map(|s| <[u8; 32]>::try_from(s).unwrap());
        let body = entry::body(&entry::commitment(&salt, &details), segment.as_ref());
        let json: serde_json::Value = serde_json::from_slice(&leaf).unwrap();
        assert_eq!(json["body"], crypto::base64(body), "the details of {at} are not what it commits to");
        let touched = Touch::decode(row.get("touched")).unwrap();
        if touched.iter().any(|t| t.kind == "kv") {
            changed.push(i64::try_from(at).unwrap());
        }
        frontier.push(crypto::hash(Domain::Leaf, &[&leaf]));
    }
    assert_eq!(i64::try_from(rows.len()).unwrap(), index + 1, "the head does not stand on the last entry");
    assert_eq!(frontier.root()[..], root[..], "the entries do not give the head's root");
    // Before the compaction mark history is not whole.
    let mark: i64 = sqlx::query_scalar("SELECT mark FROM state.compaction").fetch_one(&mut *conn).await.unwrap();
    let history: Vec<i64> =
        sqlx::query_scalar("SELECT DISTINCT index FROM state.history WHERE index > $1 ORDER BY index")
            .bind(mark)
            .fetch_all(&mut *conn)
            .await
            .unwrap();
    changed.retain(|index| *index > mark);
    assert_eq!(history, changed, "changes and entries of keys are not one to one");
    let astray: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM state.kv k WHERE index <> (SELECT max(index) FROM state.history h WHERE h.key = k.key)
            OR created_index > $1 AND version <> (SELECT count(*) FROM state.history h
                WHERE h.key = k.key AND h.created_index = k.created_index AND h.version > 0)",
    )
    .bind(mark)
    .fetch_one(&mut *conn)
    .await
    .unwrap();
    assert_eq!(astray, 0, "keys that are not their newest history row");
    let left: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT DISTINCT ON (key) key, version FROM state.history ORDER BY key, index DESC) AS newest
         WHERE version > 0 AND key NOT IN (SELECT key FROM state.kv)",
    )
    .fetch_one(conn)
    .await
    .unwrap();
    assert_eq!(left, 0, "keys that history knows and nobody else");
    index + 1
}

/// Every acknowledged write is there, once.
pub async fn holds(conn: &mut PgConnection, acknowledged: &Acknowledged) {
    let mut seen = std::collections::HashSet::new();
    for (key, indexes) in acknowledged {
        for index in indexes {
            assert!(seen.insert(*index), "index {index} was given to two writes");
            let there: bool =
                sqlx::query_scalar("SELECT EXISTS (SELECT FROM state.history WHERE key = $1 AND index = $2)")
                    .bind(key.as_bytes())
                    .bind(index)
                    .fetch_one(&mut *conn)
                    .await
                    .unwrap();
            assert!(there, "the acknowledged write of {key} at {index} is lost");
        }
    }
}
