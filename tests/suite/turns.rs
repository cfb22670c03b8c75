//! Turns of many commands: each caller hears what became of its own.

use std::collections::HashSet;

use futures_util::future::join_all;

use crate::ledger::metric;
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::proxy::{Fault, Proxy};
use crate::support::{record, until};

/// Commands that wait for the next turn, more than the writer answers itself.
const MANY: usize = 64;

#[tokio::test(flavor = "multi_thread")]
async fn many_that_waited_for_a_commit_of_unknown_fate_each_hear_of_their_own() {
    for cut in [Fault::cut_before(), Fault::cut_after()] {
        let db = database().await;
        let proxy = Proxy::before(&db);
        let daemon = Launch::on(db.url_via(&proxy)).start().await;
        let client = Client::of(&daemon);
        client.put("first", "0").await.unwrap();
        let fault = proxy.arm(cut.committing("state.history").paused());
        let put = |key: String| {
            let client = client.clone_at_self();
            tokio::spawn(async move { (client.put(&key, &key).await, key) })
        };
        let first = put("first".to_owned());
        fault.hit().await;
        let queued = metric(&client, "sop_ledger_batch_commands_count").await;
        let many: Vec<_> = (0..MANY).map(|i| put(format!("many/{i}"))).collect();
        let held = || async { metric(&client, "sop_api_requests_in_flight").await >= MANY as f64 };
        until("all of them to wait", held).await;
        fault.release();
        first.await.unwrap().0.expect("the first hears what became of it");
        let told: Vec<(i64, String)> = join_all(many)
            .await
            .into_iter()
            .map(|done| done.unwrap())
            .map(|(index, key)| (index.unwrap(), key))
            .collect();
        assert_eq!(told.iter().map(|(index, _)| index).collect::<HashSet<_>>().len(), MANY, "{told:?}");
        for (index, key) in &told {
            let (_, item) = client.get(&format!("/v1/state/kv?prefix={key}&limit=1")).await;
            assert_eq!(
                (item["items"][0]["key"].as_str(), item["items"][0]["index"].as_i64()),
                (Some(&**key), Some(*index))
            );
        }
        let turns = metric(&client, "sop_ledger_batch_commands_count").await - queued;
        assert!(turns <= 4.0, "{turns} turns: none needs to have had so many that the runtime answers");
        record::check(&db).await;
    }
}
