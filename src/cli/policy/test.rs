//! `sop policy test`: the cases of a folder, with the daemon's own engine and no daemon.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::json;

use crate::cli::{Global, WrongUse, say};
use crate::governance::cases::Case;
use crate::governance::workbench::{Coverage, Outcome};
use crate::kernel::Clock;

use super::folder::{Complaint, Folder};
use super::junit;

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Folder with *.cedar, at most one schema, and cases in tests/*.json and *_test.json
    dir: PathBuf,
    /// The schema, if not the one in the folder
    #[arg(long, value_name = "FILE")]
    schema: Option<PathBuf>,
    /// It replaces the system bundle, which rules the daemon itself
    #[arg(long)]
    system: bool,
    /// Only cases with this in their name
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Fail if fewer policies of a hundred are covered
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    min_coverage: f64,
    /// Write a report for CI, as JUnit's XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Fail on warnings too: cases that ask for what the schema does not know
    #[arg(long)]
    strict: bool,
}

/// A case that was run.
pub(super) struct Ran<'a> {
    pub file: &'a std::path::Path,
    pub outcome: Outcome,
    pub seconds: f64,
}

pub(crate) fn run(global: &Global, args: &TestArgs) -> anyhow::Result<()> {
    let wrong = |text: &str| Err(WrongUse(text.to_owned()).into());
    if !args.dir.is_dir() {
        return wrong(&format!("{} is no folder", args.dir.display()));
    }
    if !(0.0..=100.0).contains(&args.min_coverage) {
        return wrong("--min-coverage is a percentage, from 0 to 100");
    }
    let folder = match Folder::read(&args.dir, args.schema.as_deref(), args.system)? {
        Ok(folder) => folder,
        Err(complaints) => return broken(global, args, &complaints),
    };
    let bench = match folder.bench() {
        Ok(bench) => bench,
        Err(complaints) => return broken(global, args, &complaints),
    };
    let wanted = |case: &Case| args.filter.as_ref().is_none_or(|text| case.name.contains(text));
    let chosen: Vec<(&std::path::Path, &Case)> = folder
        .tests
        .iter()
        .flat_map(|f| f.cases.iter().map(|c| (f.path.as_path(), c)))
        .filter(|(_, c)| wanted(c))
        .collect();
    if chosen.is_empty() {
        return wrong(&format!("{} has no such cases", args.dir.display()));
    }
    let clock = Clock::system();
    let mut marks = vec![clock.elapsed()];
    let report = bench.run(chosen.iter().map(|(_, case)| *case), || marks.push(clock.elapsed()));
    let seconds = marks
        .windows(2)
        .map(|pair| pair.last().copied().unwrap_or_default().saturating_sub(pair.first().copied().unwrap_or_default()));
    let (failed, coverage) = (report.failed.len(), report.coverage);
    let ran: Vec<Ran<'_>> = chosen
        .iter()
        .zip(report.results)
        .zip(seconds)
        .map(|(((file, _), outcome), took)| Ran { file, outcome, seconds: took.as_secs_f64() })
        .collect();
    if let Some(file) = &args.junit {
        let text = junit::report(&ran, &coverage);
        std::fs::write(file, text).with_context(|| format!("{} cannot be written", file.display()))?;
    }
    let warnings = tell(global, &ran, &coverage);
    ensure!(failed == 0, "{failed} of {} cases do not come out as they must", ran.len());
    let (percent, least) = (coverage.percent(), args.min_coverage);
    ensure!(percent >= least, "{percent:.1} % of the policies are covered, {least} % are wanted");
    ensure!(!args.strict || warnings == 0, "{warnings} warnings");
    Ok(())
}

/// Prints what came out; how many warnings there were.
fn tell(global: &Global, ran: &[Ran<'_>], coverage: &Coverage) -> usize {
    let warnings = ran.iter().map(|r| r.outcome.warnings.len()).sum();
    let passed = ran.iter().filter(|r| r.outcome.ok).count();
    if global.json {
        let results = ran.iter().map(|r| {
            let mut result = json!(r.outcome);
            result["file"] = r.file.display().to_string().into();
            result
        });
        let (results, failed) = (results.collect::<Vec<_>>(), ran.len() - passed);
        say(json!({"cases": ran.len(), "passed": passed, "failed": failed, "coverage": coverage, "results": results}));
        return warnings;
    }
    for r in ran {
        let file = r.file.display();
        for warning in &r.outcome.warnings {
            say(format!("{file}: warning: {}: {warning}", r.outcome.name));
        }
        if !r.outcome.ok {
            say(format!("{file}: FAIL {}", r.outcome.said()));
        }
    }
    say(format!("{passed} passed, {} failed", ran.len() - passed));
    say(covered(coverage));
    warnings
}

/// `12 of 14 policies covered; not covered: a, b`.
pub(super) fn covered(coverage: &Coverage) -> String {
    let mut line = format!("{} of {} policies covered", coverage.covered, coverage.policies);
    if !coverage.uncovered.is_empty() {
        let named = coverage
            .uncovered
            .iter()
            .map(|id| if coverage.reached.contains(id) { format!("{id} (reached)") } else { id.clone() });
        line.push_str(&format!("; not covered: {}", named.collect::<Vec<_>>().join(", ")));
    }
    line
}

/// Nothing could be run.
fn broken(global: &Global, args: &TestArgs, complaints: &[Complaint]) -> anyhow::Result<()> {
    if let Some(file) = &args.junit {
        std::fs::write(file, junit::broken(complaints))
            .with_context(|| format!("{} cannot be written", file.display()))?;
    }
    super::complain(global, complaints);
    anyhow::bail!("nothing was run: {} errors", complaints.len())
}
