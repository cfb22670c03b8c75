//! `sop policy lint`: every fault of a bundle as a compiler tells it, and what no compiler knows.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;

use crate::cli::{Global, say};
use crate::governance::workbench::Finding;

use super::folder::{Complaint, Folder};

#[derive(Args)]
pub(crate) struct LintArgs {
    /// A file of Cedar policies, or a folder with *.cedar
    path: PathBuf,
    /// The schema, if not the one in the folder
    #[arg(long, value_name = "FILE")]
    schema: Option<PathBuf>,
    /// It replaces the system bundle, which rules the daemon itself
    #[arg(long)]
    system: bool,
    /// Fail on warnings too
    #[arg(long)]
    strict: bool,
}

pub(crate) fn run(global: &Global, args: &LintArgs) -> anyhow::Result<()> {
    let complaints = complaints(args)?;
    super::complain(global, &complaints);
    let errors = complaints.iter().filter(|c| c.severity == "error").count();
    let warnings = complaints.len() - errors;
    if !global.json {
        say(format!("{errors} errors, {warnings} warnings"));
    }
    ensure!(errors == 0, "{errors} errors");
    ensure!(!args.strict || warnings == 0, "{warnings} warnings");
    Ok(())
}

fn complaints(args: &LintArgs) -> anyhow::Result<Vec<Complaint>> {
    let folder = match Folder::read(&args.path, args.schema.as_deref(), args.system)? {
        Ok(folder) => folder,
        Err(wrong) => return Ok(wrong),
    };
    let bench = match folder.bench() {
        Ok(bench) => bench,
        Err(wrong) => return Ok(wrong),
    };
    let placed = |f: Finding| {
        let severity = if f.wrong { "error" } else { "warning" };
        Complaint { severity, rule: f.rule, ..folder.place(&f.fault) }
    };
    let mut found: Vec<Complaint> = bench.findings().into_iter().map(placed).collect();
    if folder.cases().next().is_some() {
        let coverage = bench.run(folder.cases(), || {}).coverage;
        for policy in bench.policies().iter().filter(|p| coverage.uncovered.contains(&p.id)) {
            let mut fault = crate::kernel::Fault::new("/policies", format!("no case covers {}", policy.id));
            (fault.line, fault.column) = policy.place.unzip();
            found.push(Complaint { severity: "warning", rule: "uncovered", ..folder.place(&fault) });
        }
    }
    found.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    Ok(found)
}
