//! A bundle on disk: `*.cedar`, at most one schema, and cases in `tests/*.json` and `*_test.json`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::cli::WrongUse;
use crate::governance::cases::{self, Case};
use crate::governance::workbench::{Bench, SCHEMA, Source};
use crate::kernel::Fault;

/// A file of it.
struct Text {
    path: PathBuf,
    text: String,
}

/// Cases, and the file they are in.
pub(crate) struct File {
    pub path: PathBuf,
    pub cases: Vec<Case>,
}

/// A bundle as its author keeps it.
pub(crate) struct Folder {
    /// In the order of their names.
    policies: Vec<Text>,
    schema: Option<Text>,
    system: bool,
    /// Its cases, by file.
    pub tests: Vec<File>,
}

/// What is wrong, and where: a line of a compiler.
pub(crate) struct Complaint {
    pub file: PathBuf,
    pub line: Option<u32>,
    pub column: Option<u32>,
    /// `error` or `warning`.
    pub severity: &'static str,
    /// What kind it is, where it is not Cedar's.
    pub rule: &'static str,
    pub message: String,
}

impl std::fmt::Display for Complaint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.file.display())?;
        for number in [self.line, self.column].into_iter().flatten() {
            write!(f, "{number}:")?;
        }
        write!(f, " {}: {} [{}]", self.severity, self.message, self.rule)
    }
}

impl Complaint {
    pub fn error(file: &Path, rule: &'static str, message: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: None, column: None, severity: "error", rule, message: message.into() }
    }

    pub fn json(&self) -> Value {
        json!({"file": self.file.display().to_string(), "line": self.line, "column": self.column, "severity": self.severity,
            "rule": self.rule, "message": self.message})
    }
}

/// The files of a folder that are called so, in the order of their names.
fn files(dir: &Path, fits: impl Fn(&str) -> bool) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("{} cannot be read", dir.display())),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("{} cannot be read", dir.display()))?.path();
        // A name that is no text is no name of ours.
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if path.is_file() && !name.starts_with('.') && fits(name) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: PathBuf) -> Result<Text, Complaint> {
    let bytes = std::fs::read(&path).map_err(|e| Complaint::error(&path, "read", e.to_string()))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Text { path, text }),
        Err(e) => {
            let at = e.utf8_error().valid_up_to();
            Err(Complaint::error(&path, "read", format!("it is not UTF-8: the first bad byte is at {at}")))
        }
    }
}

impl Folder {
    /// Reads a folder, or a file with the schema that lies beside it.
    ///
    /// The outer error is a wrong use; the inner one what is wrong in the files.
    pub fn read(path: &Path, schema: Option<&Path>, system: bool) -> anyhow::Result<Result<Self, Vec<Complaint>>> {
        let is_folder = path.is_dir();
        if !path.exists() {
            return Err(WrongUse(format!("{} is not there", path.display())).into());
        }
        let here = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = if is_folder { path } else { here };
        let policies = if is_folder { files(dir, |name| name.ends_with(".cedar"))? } else { vec![path.to_owned()] };
        if policies.is_empty() {
            return Err(WrongUse(format!("{} has no *.cedar", path.display())).into());
        }
        let schema = match schema {
            Some(file) if !file.exists() => return Err(WrongUse(format!("{} is not there", file.display())).into()),
            Some(file) => Some(file.to_owned()),
            None => schema_of(dir)?,
        };
        let mut tests = Vec::new();
        if is_folder {
            tests = files(dir, |name| name.ends_with("_test.json"))?;
            tests.extend(files(&dir.join("tests"), |name| name.ends_with(".json"))?);
        }
        Ok(Self::of(policies, schema, tests, system))
    }

    fn of(
        policies: Vec<PathBuf>,
        schema: Option<PathBuf>,
        tests: Vec<PathBuf>,
        system: bool,
    ) -> Result<Self, Vec<Complaint>> {
        let mut wrong = Vec::new();
        let mut take = |path| read(path).map_err(|e| wrong.push(e)).ok();
        let policies: Vec<Text> = policies.into_iter().filter_map(&mut take).collect();
        // The shipped schema is always merged in.
        let schema = schema.and_then(&mut take).filter(|s| s.text != SCHEMA);
        let texts: Vec<Text> = tests.into_iter().filter_map(take).collect();
        let mut found = Vec::new();
        for text in texts {
            match cases_in(text) {
                Ok(file) => found.push(file),
                Err(complaint) => wrong.extend(complaint),
            }
        }
        if wrong.is_empty() { Ok(Self { policies, schema, system, tests: found }) } else { Err(wrong) }
    }

    /// What a daemon is given: the files one after the other.
    pub fn source(&self) -> Source {
        let policies = match &self.policies[..] {
            [one] => one.text.clone(),
            many => many.iter().map(|t| format!("{}\n", t.text)).collect(),
        };
        Source { policies, schema: self.schema.as_ref().map(|s| s.text.clone()) }
    }

    /// All cases, in order.
    pub fn cases(&self) -> impl Iterator<Item = &Case> {
        self.tests.iter().flat_map(|f| &f.cases)
    }

    /// Compiles it as a daemon would.
    pub fn bench(&self) -> Result<Bench, Vec<Complaint>> {
        // Each file is whole by itself: what begins in one does not end in the next.
        let mut wrong = Vec::new();
        for file in &self.policies {
            let alone = Source { policies: file.text.clone(), schema: None };
            for fault in Bench::new(alone, false).err().into_iter().flatten() {
                wrong.push(complaint(&file.path, &fault, fault.line));
            }
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Bench::new(self.source(), self.system).map_err(|faults| faults.iter().map(|f| self.place(f)).collect())
    }

    /// Where in the files a fault of the whole is.
    pub fn place(&self, fault: &Fault) -> Complaint {
        if let ("/schema", Some(schema)) = (fault.pointer.as_str(), &self.schema) {
            return complaint(&schema.path, fault, fault.line);
        }
        let mut line = fault.line.unwrap_or(1);
        let mut files = self.policies.iter().peekable();
        while let Some(file) = files.next() {
            let lines = u32::try_from(file.text.matches('\n').count() + 1).unwrap_or(u32::MAX);
            if line <= lines || files.peek().is_none() {
                return complaint(&file.path, fault, fault.line.map(|_| line));
            }
            line -= lines;
        }
        Complaint::error(Path::new("-"), "cedar", fault.detail.clone())
    }
}

fn complaint(file: &Path, fault: &Fault, line: Option<u32>) -> Complaint {
    Complaint { line, column: fault.column, ..Complaint::error(file, "cedar", fault.detail.clone()) }
}

/// The one schema of a folder.
fn schema_of(dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let mut found = files(dir, |name| name.ends_with(".cedarschema") || name == "schema.json")?;
    if found.len() > 1 {
        let names: Vec<String> = found.iter().map(|p| p.display().to_string()).collect();
        return Err(WrongUse(format!("more than one schema: {}; say which with --schema", names.join(", "))).into());
    }
    Ok(found.pop())
}

fn cases_in(text: Text) -> Result<File, Vec<Complaint>> {
    let said = |pointer: &str, detail: &str| {
        if pointer.is_empty() { detail.to_owned() } else { format!("{pointer}: {detail}") }
    };
    let read = cases::read(text.text.as_bytes()).and_then(|found| cases::check(&found, "", usize::MAX).map(|()| found));
    match read {
        Ok(cases) => Ok(File { path: text.path, cases }),
        Err(refused) => {
            let each = refused.errors().iter().map(|f| said(&f.pointer, &f.detail));
            Err(each.map(|message| Complaint::error(&text.path, "case", message)).collect())
        }
    }
}
