//! What becomes of a rollout by itself: a canary whose denials jump stops, and what is where is told to whoever watches.

use std::collections::HashSet;

use crate::kernel::supervisor::TaskError;
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::Governance;
use super::canary::Canary;
use super::enforce::SetCanary;
use super::store::shadows;

/// Bundles and the stages they were told to be at.
pub(super) type Told = HashSet<(String, &'static str)>;

impl Governance {
    /// Stops the canary if its denials have jumped, and tells where each bundle is.
    pub(super) async fn watch_rollout(&self, told: &mut Told) -> Result<(), TaskError> {
        let force = self.rules.snapshot.force();
        if let Some(canary) = &force.canary {
            self.stop_jumping(canary, force.index).await?;
        }
        let mut now = Told::new();
        now.insert((force.active.system().id.clone(), "system"));
        now.extend(force.active.application().map(|a| (a.id.clone(), "active")));
        now.extend(force.canary.as_ref().map(|c| (c.bundle.clone(), "canary")));
        let mut conn = self.connection().await?;
        let open = shadows::open(&mut conn).await.map_err(|e| self.store.refusal(e))?;
        now.extend(open.into_iter().map(|s| (s.bundle, "shadow")));
        self.rules.metrics.canary_percent.set(force.canary.as_ref().map_or(0.0, |c| c.percent));
        self.tell(told, now);
        Ok(())
    }

    fn tell(&self, told: &mut Told, now: Told) {
        let rollout = &self.rules.metrics.rollout;
        for (bundle, stage) in told.difference(&now) {
            let _ = rollout.remove_label_values(&[bundle.as_str(), stage]);
            if !now.iter().any(|(b, _)| b == bundle) {
                self.rules.metrics.forget(bundle);
            }
        }
        now.iter().for_each(|(bundle, stage)| rollout.with_label_values(&[bundle.as_str(), stage]).set(1));
        *told = now;
    }

    async fn stop_jumping(&self, canary: &Canary, since: i64) -> Result<(), Refusal> {
        let settings = &self.rules.settings;
        let Some(tally) = canary.jumped(settings, self.rules.clock.elapsed()) else { return Ok(()) };
        let reason = format!(
            "{} of its last {} decisions denied what the active bundle permits: more than {} %",
            tally.new_denials, tally.decisions, canary.stop_at
        );
        tracing::warn!(bundle = canary.bundle, "the canary stops: {reason}");
        let stop = SetCanary {
            id: canary.bundle.clone(),
            percent: 0.0,
            stop_at: canary.stop_at,
            actor: "daemon:governance".to_owned(),
            reason: Some(reason),
            since: Some(since),
        };
        match self.ledger.write(&Caller::daemon("governance"), &[], stop).await {
            // Another daemon stopped it, or somebody changed it.
            Err(r) if r.problem() == &problem::CONFLICT => Ok(()),
            done => done.map(|_| self.rules.metrics.canary_stops.inc()),
        }
    }
}
