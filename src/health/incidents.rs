//! Incidents: one open for each thing that is wrong, from the entry that says so to the one that says it is over.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::{Refusal, Timestamp, ids, problem};
use crate::ledger::{Command, Entry, Failure, Tx};

use super::model::{Happened, Incident, Stage};
use super::store;

/// Where and when an entry of the command at hand stands, and whose it is.
pub(super) struct Here<'a> {
    pub index: i64,
    pub now: Timestamp,
    pub actor: &'a str,
}

impl Here<'_> {
    fn happened(&self, kind: &str, note: &str) -> Happened {
        Happened { index: self.index, time: self.now, actor: self.actor.into(), kind: kind.into(), note: note.into() }
    }
}

/// What an incident is opened for.
pub(super) struct Wrong<'a> {
    pub fingerprint: &'a str,
    pub severity: &'a str,
    pub summary: &'a str,
    pub service: Option<&'a str>,
}

/// Opens an incident, or notes in the open one that it happened again.
pub(super) async fn open(conn: &mut PgConnection, here: &Here<'_>, wrong: &Wrong<'_>) -> Result<Uuid, sqlx::Error> {
    if let Some(incident) = store::open(conn, wrong.fingerprint).await? {
        store::put_incident(conn, &incident, &here.happened("again", wrong.summary)).await?;
        return Ok(incident.id);
    }
    let incident = Incident {
        id: ids::new_id(here.now),
        fingerprint: wrong.fingerprint.to_owned(),
        severity: wrong.severity.to_owned(),
        status: Stage::Open,
        summary: wrong.summary.to_owned(),
        service: wrong.service.map(str::to_owned),
        opened_at: here.now,
        opened_index: here.index,
        resolved_at: None,
        resolved_index: None,
        events: None,
    };
    store::put_incident(conn, &incident, &here.happened("opened", wrong.summary)).await?;
    Ok(incident.id)
}

/// Ends the open incident of a fingerprint, if there is one.
pub(super) async fn resolve(
    conn: &mut PgConnection,
    here: &Here<'_>,
    fingerprint: &str,
    note: &str,
) -> Result<Option<Uuid>, sqlx::Error> {
    let Some(incident) = store::open(conn, fingerprint).await? else { return Ok(None) };
    end(conn, here, incident, note).await.map(|i| Some(i.id))
}

async fn end(
    conn: &mut PgConnection,
    here: &Here<'_>,
    mut incident: Incident,
    note: &str,
) -> Result<Incident, sqlx::Error> {
    incident.status = Stage::Resolved;
    incident.resolved_at = Some(here.now);
    incident.resolved_index = Some(here.index);
    store::put_incident(conn, &incident, &here.happened("resolved", note)).await?;
    Ok(incident)
}

/// What somebody says of an incident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Acknowledge,
    Resolve,
    Comment,
}

/// Says it.
pub(super) struct Say {
    pub id: Uuid,
    pub word: Word,
    pub actor: String,
    pub note: String,
}

impl Command for Say {
    type Out = Incident;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Incident, Entry), Failure> {
        let found = store::incident_of(tx.read(), self.id).await?;
        let mut incident = found.ok_or_else(|| Refusal::not_found(format!("incident {}", self.id)))?;
        let over = incident.status == Stage::Resolved;
        if over && self.word != Word::Comment {
            return Err(Refusal::new(&problem::CONFLICT, "the incident is resolved").into());
        }
        let here = Here { index: tx.index(), now: tx.now(), actor: &self.actor };
        let action = match self.word {
            Word::Acknowledge => {
                incident.status = Stage::Acknowledged;
                store::put_incident(tx.write(), &incident, &here.happened("acknowledged", &self.note)).await?;
                "health:acknowledge"
            }
            Word::Comment => {
                store::put_incident(tx.write(), &incident, &here.happened("comment", &self.note)).await?;
                "health:comment"
            }
            Word::Resolve => {
                incident = end(tx.write(), &here, incident, &self.note).await?;
                "health:resolve"
            }
        };
        incident.events = Some(store::events(tx.read(), self.id).await?);
        let mut entry =
            Entry::ok(action, format!("incident/{}", self.id)).change("fingerprint", &*incident.fingerprint);
        if !self.note.is_empty() {
            entry = entry.reason(self.note.clone());
        }
        Ok((incident, entry))
    }
}

/// Opens the incident of an entry that carried a signal. Once: what was taken in before is refused.
pub(super) struct Taken {
    pub at: i64,
    pub severity: String,
    pub fingerprint: String,
    pub summary: String,
}

impl Command for Taken {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        if store::followed(tx.read()).await? >= self.at {
            return Err(Refusal::new(&problem::CONFLICT, "the signal was taken in before").into());
        }
        let here = Here { index: tx.index(), now: tx.now(), actor: "daemon:health" };
        let wrong =
            Wrong { fingerprint: &self.fingerprint, severity: &self.severity, summary: &self.summary, service: None };
        let id = open(tx.write(), &here, &wrong).await?;
        store::follow(tx.write(), self.at).await?;
        let entry = Entry::ok("health:incident", format!("incident/{id}"))
            .change("fingerprint", self.fingerprint.clone())
            .change("signal_index", self.at);
        Ok(((), entry))
    }
}
