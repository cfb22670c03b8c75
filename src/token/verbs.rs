//! What of the room can be made together with changes of others.

use crate::kernel::Refusal;
use crate::kernel::web::{Ask, Caller, block};
use crate::ledger::verbs::{Decides, Operation, Verb};

use super::http::UseBody;
use super::operations::{Use, User, digest};
use super::store::operations as store;
use super::{Token, VERIFICATIONS};

impl Token {
    /// Its verbs.
    #[must_use]
    pub fn verbs(&self) -> Vec<Verb> {
        let token = self.clone();
        vec![Verb::new("token:operation-use", move |caller, body| {
            let token = token.clone();
            async move { token.use_step(&caller, body).await }
        })]
    }

    async fn use_step(&self, caller: &Caller, body: UseBody) -> Result<Operation, Refusal> {
        let UseBody { token, operation, resource } = body;
        self.spend(caller.actor(), VERIFICATIONS, self.allowance(caller.actor()).verifications, 1)?;
        let digest = digest(&token);
        let mut user = User::of(caller, None);
        if !user.administrator {
            user.service = self.service_for(caller, &digest).await?;
        }
        let ask = Ask::new("token:operation-use", "Operation", operation.clone());
        let step = Use { digest, operation, resource, user, from: block(caller.request().peer) };
        let counted = self.counted.uses.with_label_values(&["ok"]);
        Ok(Operation::new(vec![ask], Decides(step)).done(move |_| counted.inc()))
    }

    /// The service that a token is for, if the caller is it and the token is not its own. Whether the token is good is found
    /// out under the lock.
    async fn service_for(&self, caller: &Caller, digest: &[u8; 32]) -> Result<Option<String>, Refusal> {
        let Some(services) = self.services.get() else { return Ok(None) };
        let found = store::standings(&mut *self.reader().await?, &[digest.to_vec()]).await;
        let Some((_, standing)) = found.map_err(|e| self.store.refusal(e))?.pop() else { return Ok(None) };
        let audience = &standing.token.audience;
        let other = audience != caller.actor();
        Ok((other && services.provides(caller.actor(), audience).await?).then(|| audience.clone()))
    }
}
