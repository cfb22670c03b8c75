//! Transactions inside a transaction. All conditions, theirs too, are about what was before the first change, as etcd has it; so
//! what is done is known before anything is, and is done one after the other as in any branch.

use sqlx::PgConnection;

use crate::kernel::BoxFuture;
use crate::kernel::web::Ask;

use super::{Compare, Op, Outcome, Tell, Told, hold};

/// Conditions, and what is done if all of them hold, or if not.
#[derive(Clone, Debug)]
pub(in crate::state) struct Branches {
    pub compares: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
}

impl Branches {
    pub(super) fn ops(&self) -> impl Iterator<Item = &Op> {
        self.then.iter().chain(&self.otherwise)
    }

    /// What either branch asks for.
    pub(super) fn asks(&self) -> Vec<Ask> {
        self.compares.iter().map(Compare::ask).chain(self.ops().flat_map(Op::asks)).collect()
    }

    pub(super) fn branch(&self, succeeded: bool) -> &[Op] {
        if succeeded { &self.then } else { &self.otherwise }
    }

    /// Whether neither branch changes anything.
    pub(super) fn reads(&self) -> bool {
        self.ops().all(Op::reads)
    }
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The operation at this place.
    Op(usize),
    /// A transaction inside begins; whether its conditions held.
    Begin(bool),
    /// It ends.
    End,
}

/// Looks at the conditions of the transactions inside a branch: the steps to take, and the operations they are about.
pub(super) async fn resolve<'a>(
    conn: &mut PgConnection,
    branch: &'a [Op],
) -> Result<(Vec<Step>, Vec<&'a Op>), sqlx::Error> {
    let (mut steps, mut ops) = (Vec::with_capacity(branch.len()), Vec::with_capacity(branch.len()));
    inside(conn, branch, &mut steps, &mut ops).await?;
    Ok((steps, ops))
}

fn inside<'a: 'f, 'f>(
    conn: &'f mut PgConnection,
    branch: &'a [Op],
    steps: &'f mut Vec<Step>,
    ops: &'f mut Vec<&'a Op>,
) -> BoxFuture<'f, Result<(), sqlx::Error>> {
    Box::pin(async move {
        for op in branch {
            let Op::Txn(txn) = op else {
                steps.push(Step::Op(ops.len()));
                ops.push(op);
                continue;
            };
            let succeeded = hold(&txn.compares, conn).await?;
            steps.push(Step::Begin(succeeded));
            inside(conn, txn.branch(succeeded), steps, ops).await?;
            steps.push(Step::End);
        }
        Ok(())
    })
}

/// What operations came to, those of a transaction inside in its place.
pub(super) struct Results {
    tell: Tell,
    told: Vec<Told>,
    /// Of those that began and have not ended: whether their conditions held, and where their results begin.
    open: Vec<(bool, usize)>,
    /// Of all that began, in order: whether their conditions held.
    inside: Vec<bool>,
}

impl Results {
    pub fn new(tell: Tell) -> Self {
        Self { tell, told: Vec::new(), open: Vec::new(), inside: Vec::new() }
    }

    pub fn push(&mut self, outcome: Outcome<'_>, index: i64) {
        self.told.push((self.tell)(outcome, index));
    }

    pub fn begin(&mut self, succeeded: bool) {
        self.open.push((succeeded, self.told.len()));
        self.inside.push(succeeded);
    }

    pub fn end(&mut self, index: i64) {
        if let Some((succeeded, from)) = self.open.pop() {
            let results = self.told.split_off(from);
            self.push(Outcome::Txn { succeeded, results }, index);
        }
    }

    pub fn inside(&self) -> &[bool] {
        &self.inside
    }

    pub fn told(self) -> Vec<Told> {
        self.told
    }
}
